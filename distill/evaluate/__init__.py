"""ShapeBench: measures clips from pixels, and scores teachers and students against the known world."""
