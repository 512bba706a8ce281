"""The sparse product of packed N:M weights and what it stands on; imported as `streamprune_kernels`.

Importing it needs neither CuPy nor a driver nor a GPU.
"""

from streamprune_kernels.reference import expand, nm_linear, pack_mask, pack_values, unpack_mask

__all__ = ["expand", "nm_linear", "pack_mask", "pack_values", "unpack_mask"]
