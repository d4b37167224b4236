"""The three example photographs, from the collection that scikit-image bundles (public domain and CC0)."""
import PIL.Image
import skimage.data


def photo(name, size=None, crop=None):
    """RGB PIL image; `crop` is (left, top, right, bottom) of the original, `size` is (width, height) after it."""
    image = PIL.Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    if crop:
        image = image.crop(crop)
    return image.resize(size, PIL.Image.Resampling.LANCZOS) if size else image
