"""The station: watches folders, judges each part once, remembers it, tells the plant."""
