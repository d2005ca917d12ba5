"""The demo model: scenes drawn by a program, and a small Z-Image trained on them.

`scenes` draws, `captions` describes in English and Chinese, `training` and its neighbours train the three parts,
`checker` reads pictures back by plain image analysis. Nothing here is needed to export or to run a model.
"""
