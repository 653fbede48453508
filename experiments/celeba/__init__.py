"""Shuffled pairs of images with a known optimal transport: does a flow memorize them, and at which noise?"""
