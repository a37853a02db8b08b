"""Files, as nobody can be relied on to leave them.

- `paths`: what lies at a path, and below it
- `writing`: files and folders that are whole or not there
- `json`: JSON that is read with bounds, and written whole
- `tables`: what is recorded of a folder's files, and how it departs from that
"""
