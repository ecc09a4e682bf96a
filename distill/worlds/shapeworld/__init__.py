"""ShapeWorld: a captioned procedural video world whose joint law is known exactly."""
