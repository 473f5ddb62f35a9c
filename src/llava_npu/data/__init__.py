"""Records, templates, labels, images and the plan of a run."""
