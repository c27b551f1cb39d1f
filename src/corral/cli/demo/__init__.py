"""`corral demo`: the main job, from nothing to a clean shutdown, with every promise checked on the way."""
