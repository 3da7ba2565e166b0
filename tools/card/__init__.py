"What `tools/gpu.py` measures on a card, part by part, and the runs that are made on one and brought home."
