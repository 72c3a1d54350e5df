"""Triton kernels and their launches. Importing this package imports Triton; `import dico_kernels` does not.

The functions expect what the op layer has checked: channels_last images of one type and device, vectors whose rows have
no gaps.
"""
