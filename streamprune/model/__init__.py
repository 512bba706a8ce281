"""The network: transformers' own modules on the meta device, one block at a time made real."""
