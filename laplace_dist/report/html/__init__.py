"""The report: one self-contained page about a run, and the same numbers as a file.

`facts` gathers the numbers from the checkpoint, one file per section; `figures` draws them; `page` puts them on a page.
"""

from __future__ import annotations
