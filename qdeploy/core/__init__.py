"""What things are called: schemes and encodings of tensors, canonical ops, targets, recipes, errors, and the registries that find
files by name. Plain data and the standard library, so that whoever lists targets or reads `--help` waits for no torch.

Imports: nothing of qdeploy.
"""
