"""Files of records, in every form that is read."""
