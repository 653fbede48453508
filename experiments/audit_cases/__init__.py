"""Audits of trained networks whose answer is known: how often is the verdict right?"""
