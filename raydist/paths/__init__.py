"""Schedules, sources, couplings and discrete probability paths: pure mathematics on tensors. Time 0 is noise, 1 is data."""
