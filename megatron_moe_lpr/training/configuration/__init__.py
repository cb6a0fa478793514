"""The flags of a run, its stages, and the description that a resumed run is compared with."""
