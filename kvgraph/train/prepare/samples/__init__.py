"""A few records of every source, in the public data sets' own schemas, to try everything without a network.

They were written for this project and are in the public domain (CC0 1.0).
"""
