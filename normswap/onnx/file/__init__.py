"""An ONNX file by itself: what it is, what it says of itself, what it computes. No torch here.

``verify`` works on machines without torch; an import contract holds that nothing in this room
imports it. What comes in is a file that nobody vouches for.
"""
