"""The statistics of a tile and the scale that follows from them."""
