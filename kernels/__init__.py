"""Local computations that surround the hops: they know tensors and nothing else, and never communicate."""
