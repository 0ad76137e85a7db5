"""What everything shares. Imports no other folder of the project."""
