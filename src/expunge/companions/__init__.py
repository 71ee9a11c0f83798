"""What goes with the forget items, made before training: by rule, or by a model."""
