"""What models that memory does not hold take: private memory, bytes read, seconds."""
