"""The English lexicon."""

from __future__ import annotations

from notellm2_ray.data.world.lexicon import Lexicon, lines, vocabularies, words

_SUBJECTS = vocabularies("""
trail summit backpack ridge campsite boot waterfall compass hike meadow valley hut
sourdough oven croissant dough pastry flour icing cupcake whisk bagel crust muffin
kitten paw whisker collar litter scratcher purr tabby catnip fur tail cattery
espresso barista latte roast grinder crema cappuccino mug portafilter kettle brew cafe
surfboard wave beach wetsuit tide lagoon reef shore snorkel sandcastle pier harbor
yoga mat stretch asana breathing pilates balance posture studio meditation savasana flow
guitar chord amplifier melody vinyl drum concert singer rehearsal ukulele piano chorus
seedling greenhouse compost tomato trellis pruner rosebush soil gardener tulip hedge planter
lipstick mascara serum moisturizer blush eyeliner cleanser foundation sunscreen toner eyeshadow concealer
bicycle pedal saddle helmet derailleur cyclist chain handlebar sprint peloton puncture velodrome
novel bookshelf chapter author library paperback bookmark poem memoir thriller sequel bookshop
sofa curtain rug lamp cushion wallpaper armchair bookcase headboard candleholder sideboard ottoman
sneaker jacket scarf denim blouse handbag skirt cardigan coat bracelet necklace loafer
keyboard laptop monitor processor headset router charger tablet firmware touchpad webcam smartwatch
telescope galaxy comet nebula planet orbit eclipse meteor stargazing crater satellite moonrise
ramen noodle dumpling broth wok sushi tofu kimchi dimsum curry scallion chopstick
passport airport itinerary hostel suitcase boarding visa layover souvenir landmark ferry guidebook
toddler stroller pacifier crib diaper playground nursery bedtime lullaby daycare bib highchair
lens shutter tripod aperture darkroom portrait viewfinder exposure negative flash polaroid panorama
watercolor canvas easel sketchbook brush acrylic palette mural charcoal gouache pigment drawing
dumbbell treadmill squat deadlift barbell protein workout plank rower burpee gym kettlebell
salad avocado smoothie quinoa granola spinach yogurt hummus blueberry kale oatmeal chickpea
puppy leash kennel puppyhood retriever fetch bark dogpark muzzle terrier grooming spaniel
sewing yarn crochet knitting thread needle embroidery quilt fabric loom bobbin thimble
""")

_STYLES = vocabularies("""
cozy snug warm homely soft toasty fireside mellow hygge cushioned welcoming restful
minimalist uncluttered clean sparse simple plain bare spartan tidy understated austere streamlined
vintage retro antique nostalgic classic dated timeworn heirloom faded secondhand bygone historic
dramatic intense bold fiery theatrical striking passionate fierce grand daring thunderous breathtaking
playful goofy whimsical silly cheeky bouncy funny mischievous quirky cartoonish giggly zany
rustic earthy wooden rugged weathered handmade countryside woodland rough natural mossy homespun
romantic dreamy tender lovely delicate candlelit poetic swooning heartfelt enchanting blushing sentimental
futuristic neon electric cyber glowing sleek digital robotic bionic metallic synthetic luminous
sweet sugary cute adorable girly pastel frilly bubbly darling bubblegum candied dainty
luxurious indulgent velvety rich opulent decadent gourmet lavish plush silky sumptuous premium
tropical sunny breezy summery exotic juicy zesty citrusy beachy vivid balmy sunlit
elegant refined formal graceful polished chic tailored sophisticated stately poised monochrome timeless
""")

_SENTENCES = lines("""
This {s} turned out more {t} than we expected.
We kept the {t} {s} for the whole afternoon.
Nobody told me that {s} could feel so {t}.
My sister calls the {s} her most {t} find.
After the {s} everything in the house seemed {t}.
I photographed the {s} because the light was {t}.
Friends often ask how the {s} stays so {t}.
Start with the {s} and keep the rest {t}.
Last week the {s} gave us something truly {t}.
Honestly, the {t} {s} is worth every single minute.
Take your time with the {s} and stay {t}.
Here is how the {s} becomes {t} at home.
Some people find the {s} a little too {t}.
Save this note for the next {t} {s} day.
Between two meetings the {s} felt strangely {t} again.
The {s} in the second picture looks wonderfully {t}.
Next time we will bring a second {t} {s}.
It cost little, but the {s} is quite {t}.
On rainy days the {t} {s} works just fine.
Tell me below whether your {s} is this {t}.
All morning long the {s} remained pleasant and {t}.
What surprised everybody was how {t} the {s} became.
Without the {s} this weekend would be less {t}.
My advice is one {t} {s} for each season.
""")

LEXICON = Lexicon(
    subjects=_SUBJECTS,
    styles=_STYLES,
    things=words(
        "thing moment idea plan choice surprise habit project routine result story detail experience favorite "
        "discovery change secret lesson tip memory gift"
    ),
    qualities=words(
        "good nice great special different useful real new proper helpful interesting important memorable "
        "pleasing decent usual regular certain possible"
    ),
    sentences=_SENTENCES,
    titles=lines("""
My {t} {s} diary
A weekend with {t} {s}
How the {s} became so {t}
Notes on the {t} {s}
Why this {s} feels {t}
Finally found the {t} {s}
The {t} {s} in three steps
Everything about our {t} {s}
"""),
    join=" ",
    short_sentences=(1, 3),
    usual_sentences=(8, 12),
    long_sentences=(20, 27),
    patterns=lines("""
wide horizontal stripes
a large disc
big checks
wide rings
a few rays
wide vertical stripes
many small dots
waves
wide rising diagonal stripes
a cross
big diamonds
a spiral
wide falling diagonal stripes
a few big dots
zigzags
a square frame
narrow horizontal stripes
small checks
narrow rings
many rays
narrow vertical stripes
small diamonds
narrow rising diagonal stripes
two halves
"""),
    palettes=lines("""
amber and teal
ivory and black
navy and coral
crimson and cream
mint and plum
forest green and gold
lavender and indigo
black and lime
pink and magenta
chocolate and peach
turquoise and orange
sky blue and white
"""),
    no_pattern="soft clouds",
    no_palette="grey",
    captions=(
        "{palette}, {pattern}",
        "{pattern} in {palette}",
        "a picture of {pattern} in {palette}",
        "{palette} picture with {pattern}",
    ),
)
