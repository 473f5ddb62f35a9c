"""Files of questions, in every form that is read."""
