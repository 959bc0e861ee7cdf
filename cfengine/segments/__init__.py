"""The transformer between two self-attentions, and the walk that joins the pieces."""
