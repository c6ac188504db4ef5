"""The quality of guided pictures: what is measured, its pictures, scores and drawings."""
