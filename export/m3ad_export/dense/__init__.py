"""Methods as one writes them in plain eager PyTorch: every pixel through every layer, on any device."""
