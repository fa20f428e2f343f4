"""The networks: language models, vision towers, projector, adapters, and the joint model.

Nothing here knows devices, ranks, optimisers or the paths of a run.
"""
