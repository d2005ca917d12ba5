"""The lean runtime: a bundle goes in, an image comes out. Never imports torch.

Modules follow the way of an image: ``bundle`` opens the files, ``tokenizer`` turns a prompt into ids,
``schedule``, ``geometry`` and ``noise`` make the numbers that the loop needs, ``executor`` names what a device
must be able to do, ``ort`` does it with ONNX Runtime, and ``pipeline`` drives the steps.
"""
