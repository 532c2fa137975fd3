"""The synthetic world: drawn images, written texts and users with drifting tastes, all following from one seed.

Every note has two hidden factors, a *subject* and a *style*, independent and uniform. Users want certain subjects in
certain styles, so notes that are read together share both. What the text and the image tell of either factor is set by
the information knobs alone (`text_subject`, `text_style`, `image_subject`, `image_style` of
:class:`~notellm2_ray.core.settings.WorldSettings`): no variant, prompt, loss or baseline is favoured, and nothing else
about a note depends on its factors. Short notes have no knob of their own: every unit of text (title, topics, each
sentence) tells with one and the same probability, set so that the share over all notes is the knob's, and a text of few
units therefore tells less, as short texts do.

Each note depends on the seed and its own number only, each user on the seed, the user's own number and the notes, so
that any part of a world of any size can be made anywhere, and always comes out the same.
"""
