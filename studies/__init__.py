"""Studies of the method: what was asked, how it was measured, and the results, one folder a study."""
