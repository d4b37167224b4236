"""The text on which the tiny tokenizers are trained: edit instructions in our own words, and a little non-English."""

CORPUS = """Make the astronaut wear a red knitted hat, keep the face and the pose the same.
Change the background to a snowy mountain at sunset, with soft golden light.
Replace the cat with a small brown dog; keep the sofa, the window and the shadows.
Turn this photo into a watercolor painting with visible brush strokes and paper texture.
Remove the people in the background and fill the space with trees and grass.
Add a wooden sign that says "Open until nine" in large yellow letters above the door.
Restore and colorize this old black and white photograph, remove scratches and dust.
Make it night time, add street lamps, wet asphalt and reflections in the windows.
The quick brown fox jumps over the lazy dog, while 12345 67890 birds fly away.
In the same style, let a goat, a hen and a mouse have breakfast around a small white table.
Replace 'closed' with 'open' on the poster. Don't change the font, the size or the colour.
A portrait of a woman with long curly hair, wearing a blue dress, standing in a field of flowers.
The car in the image should be green, not red; the wheels should be black.
Zoom out and show the whole building, keep the perspective and the lighting unchanged.
Convert the picture to a pencil sketch with fine lines and light shading.
Put sunglasses on the man's face, and change his shirt to a striped one.
Make the toy robot hold a lantern, knitted wool style, detailed, vibrant colors, 4k.
Let the water be calm, with a mirror reflection of the sky, clouds and mountains.
Draw the same character from behind, walking through a forest in the rain.
What if this room was a cosy library with wooden shelves, books, a lamp and an armchair?
I'd like it brighter: increase exposure, lower contrast, and warm up the white balance.
She's holding an umbrella; we'll keep that, but they've asked to remove the bag you're seeing.
Low quality, blurry, jpeg artifacts, bad anatomy, watermark, text, signature, out of frame.
Place the bottle on a marble table next to a bowl of fruit: apples, oranges, grapes and a lemon.
Transform the sketch into a photorealistic image of a modern house with a garden and a pool.
Un café crème, s'il vous plaît; der Bär schläft im Wald; la niña pequeña come una manzana.
"""
