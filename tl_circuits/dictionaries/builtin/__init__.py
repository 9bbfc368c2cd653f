"""The model that comes with the package: `tiny-facts`, its transcoders, and the world it knows."""
