"""The built-in model `tiny-facts`: its transcoders, and the world of facts that it knows."""
