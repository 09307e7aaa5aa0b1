"""What caches would hit: the live tree and policies, without tensors."""
