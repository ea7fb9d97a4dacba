"""Set attention: all queries of a set attend to its rows, whose norms are encoded on the way."""
