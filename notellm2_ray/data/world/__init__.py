"""The synthetic world: drawn images, written texts and users with drifting tastes, all following from one seed.

Every note has two hidden factors, a *subject* and a *style*, independent and uniform. Users want certain subjects in
certain styles, so notes that are read together share both. Only the information knobs (`text_subject`, `text_style`,
`image_subject`, `image_style` of :class:`~notellm2_ray.data.world.settings.WorldSettings`) decide how much the text and
the image tell of each factor. No variant, prompt, loss or baseline is favoured, and nothing else about a note depends
on its factors. Short notes have no knob of their own: every unit of text (the title, the topics, each sentence) tells a
factor with the same probability, chosen so that the share over all notes is the knob's. A text of few units therefore
tells less, as short texts do.

A note depends on the seed and its own number only; a user on the seed, the user's own number and the notes. So any part
of a world of any size can be made on any machine, and always comes out the same.
"""
