"""Who starts it: the only folder that imports ray."""
