"""How many experts each layer should get, measured on the dense model before it is upcycled."""
