"""What users bring: models and data from files and folders, told apart by content, screened, checked, and refused with reasons.

Imports: core, importing.
"""
