"""A layer's weight as one matrix, wherever it lies: a whole parameter, its transpose, rows of it, one expert's part."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightView:
    """The weight [out_features, in_features] of one linear layer inside a parameter of the model.

    name        the layer's, which packed tensors are called by
    parameter   full name of the tensor that holds the weight
    shape       (out_features, in_features)
    expert      place along the first dimension of a 3-D parameter [experts, ...]; None: the parameter is 2-D
    transposed  the parameter's matrix is [in, out], as of GPT-2's Conv1D
    rows        the layer's among the output rows of a fused parameter, in the layer's order: a range (gate and up one
                after the other, or every second one), or numbers (query, key and value interleaved head by head, as in
                GPT-NeoX); None: all rows
    """

    name: str
    parameter: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    rows: range | tuple[int, ...] | None = None

    @property
    def input_dim(self) -> int:
        """Which dimension of a 2-D parameter the layer's inputs lie along; its outputs lie along the other."""
        return 0 if self.transposed else 1

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] of the parameter's tensor: a view of its memory, but where rows are numbers a copy.

        Raises ValueError where the tensor is of another shape than the parameter.
        """
        matrix = self._matrix(tensor)
        if isinstance(self.rows, range):
            matrix = matrix[self.rows.start : self.rows.stop : self.rows.step]
        elif self.rows is not None:
            matrix = matrix[self._numbers(tensor)]
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"{self.name}: {self.parameter} {list(tensor.shape)} holds no weight {list(self.shape)}")
        return matrix

    def write(self, tensor: torch.Tensor, weight: torch.Tensor) -> None:
        """Put a weight [out, in] where `read` takes it from; what else the tensor holds stays."""
        if self.rows is None or isinstance(self.rows, range):
            self.read(tensor).copy_(weight)
        else:
            self._matrix(tensor)[self._numbers(tensor)] = weight

    def _matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """All output rows of the parameter that hold this one's matrix, [rows, in]; a view."""
        if tensor.ndim != (2 if self.expert is None else 3):
            raise ValueError(f"{self.name}: {self.parameter} has {tensor.ndim} dimensions")
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.T if self.transposed else matrix

    def _numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.rows, device=tensor.device)
