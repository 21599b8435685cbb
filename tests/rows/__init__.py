"""The test table: one file per family. See `models.FamilyRow`."""
