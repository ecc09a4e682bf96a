"""ShapeBench: clips measured from pixels, and teachers and students scored against the known world."""
