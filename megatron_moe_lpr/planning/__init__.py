"""What a run will need before it is started: parameters, memory, layouts. Nothing is built or loaded."""
