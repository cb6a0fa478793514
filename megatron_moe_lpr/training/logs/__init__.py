"""metrics.jsonl, TensorBoard, Weights & Biases, and warnings of a loss that climbs."""
