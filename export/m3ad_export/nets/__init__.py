"""The frozen encoders, in plain PyTorch, and their exact rewrites."""
