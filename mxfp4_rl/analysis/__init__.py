"""What a recipe does to a checkpoint: read its weights tensor by tensor, and measure each with the quantiser."""
