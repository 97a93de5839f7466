"""What the tiny Gemma can talk about: tables of English words with their Persian ones.  Written for this project."""


def listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


UNITS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
UNITS_FA = listed("صفر یک دو سه چهار پنج شش هفت هشت نه ده یازده دوازده سیزده چهارده پانزده شانزده هفده هجده نوزده")
TENS_FA = listed("بیست سی چهل پنجاه شصت هفتاد هشتاد نود")
# They are irregular.
HUNDREDS_FA = listed("صد دویست سیصد چهارصد پانصد ششصد هفتصد هشتصد نهصد")

ORDINALS = listed(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)

WEEKDAYS = (
    ("Saturday", "شنبه"),
    ("Sunday", "یکشنبه"),
    ("Monday", "دوشنبه"),
    ("Tuesday", "سه‌شنبه"),
    ("Wednesday", "چهارشنبه"),
    ("Thursday", "پنجشنبه"),
    ("Friday", "جمعه"),
)

# With their days in a common year.
MONTHS = (
    ("January", "ژانویه", 31),
    ("February", "فوریه", 28),
    ("March", "مارس", 31),
    ("April", "آوریل", 30),
    ("May", "مه", 31),
    ("June", "ژوئن", 30),
    ("July", "ژوئیه", 31),
    ("August", "اوت", 31),
    ("September", "سپتامبر", 30),
    ("October", "اکتبر", 31),
    ("November", "نوامبر", 30),
    ("December", "دسامبر", 31),
)

# First names for the small talk; nobody in particular.
NAMES = (
    ("Sara", "سارا"),
    ("Ali", "علی"),
    ("Maryam", "مریم"),
    ("Reza", "رضا"),
    ("Omid", "امید"),
    ("Leila", "لیلا"),
    ("Anna", "آنا"),
    ("Tom", "تام"),
    ("Jack", "جک"),
    ("Zahra", "زهرا"),
    ("Roya", "رؤیا"),
    ("Peter", "پیتر"),
)

COLOURS = {
    "red": "قرمز",
    "blue": "آبی",
    "green": "سبز",
    "yellow": "زرد",
    "white": "سفید",
    "black": "سیاه",
    "brown": "قهوه‌ای",
    "grey": "خاکستری",
    "orange": "نارنجی",
    "purple": "بنفش",
    "pink": "صورتی",
}

# (noun phrase, Persian, colour)
COLOURED = (
    ("snow", "برف", "white"),
    ("milk", "شیر", "white"),
    ("salt", "نمک", "white"),
    ("cotton", "پنبه", "white"),
    ("a swan", "قو", "white"),
    ("grass", "چمن", "green"),
    ("a leaf", "برگ", "green"),
    ("a cucumber", "خیار", "green"),
    ("spinach", "اسفناج", "green"),
    ("a frog", "قورباغه", "green"),
    ("the sky", "آسمان", "blue"),
    ("the sea", "دریا", "blue"),
    ("blood", "خون", "red"),
    ("a tomato", "گوجه‌فرنگی", "red"),
    ("a strawberry", "توت‌فرنگی", "red"),
    ("a cherry", "گیلاس", "red"),
    ("a pomegranate", "انار", "red"),
    ("coal", "زغال", "black"),
    ("a crow", "کلاغ", "black"),
    ("a lemon", "لیمو", "yellow"),
    ("a banana", "موز", "yellow"),
    ("the sun", "خورشید", "yellow"),
    ("a chick", "جوجه", "yellow"),
    ("a carrot", "هویج", "orange"),
    ("an aubergine", "بادمجان", "purple"),
    ("a violet", "بنفشه", "purple"),
    ("chocolate", "شکلات", "brown"),
    ("coffee", "قهوه", "brown"),
    ("wood", "چوب", "brown"),
    ("an elephant", "فیل", "grey"),
    ("a mouse", "موش", "grey"),
    ("a flamingo", "فلامینگو", "pink"),
)

# Kind, with its article: Persian, members.
KINDS = {
    "an animal": (
        "حیوان",
        (
            ("a cat", "گربه"),
            ("a dog", "سگ"),
            ("a horse", "اسب"),
            ("a cow", "گاو"),
            ("a sheep", "گوسفند"),
            ("a goat", "بز"),
            ("a bear", "خرس"),
            ("a fox", "روباه"),
            ("a wolf", "گرگ"),
            ("a rabbit", "خرگوش"),
            ("a camel", "شتر"),
            ("a monkey", "میمون"),
        ),
    ),
    "a bird": (
        "پرنده",
        (
            ("a sparrow", "گنجشک"),
            ("a pigeon", "کبوتر"),
            ("an eagle", "عقاب"),
            ("a duck", "اردک"),
            ("a parrot", "طوطی"),
            ("an owl", "جغد"),
            ("a rooster", "خروس"),
        ),
    ),
    "a fruit": (
        "میوه",
        (
            ("an apple", "سیب"),
            ("a banana", "موز"),
            ("a pear", "گلابی"),
            ("a peach", "هلو"),
            ("an orange", "پرتقال"),
            ("a cherry", "گیلاس"),
            ("a watermelon", "هندوانه"),
        ),
    ),
    "a flower": (
        "گل",
        (("a tulip", "لاله"), ("a violet", "بنفشه"), ("a jasmine", "یاسمن"), ("a narcissus", "نرگس")),
    ),
    "a drink": ("نوشیدنی", (("tea", "چای"), ("coffee", "قهوه"), ("milk", "شیر"), ("water", "آب"))),
    "a vehicle": (
        "وسیلهٔ نقلیه",
        (
            ("a car", "خودرو"),
            ("a bus", "اتوبوس"),
            ("a train", "قطار"),
            ("a bicycle", "دوچرخه"),
            ("a ship", "کشتی"),
            ("an aeroplane", "هواپیما"),
        ),
    ),
    "a tool": ("ابزار", (("a hammer", "چکش"), ("a saw", "اره"), ("a needle", "سوزن"), ("a spade", "بیل"))),
    "a musical instrument": (
        "ساز",
        (("a piano", "پیانو"), ("a guitar", "گیتار"), ("a violin", "ویولن"), ("a drum", "طبل"), ("a flute", "فلوت")),
    ),
    "a metal": ("فلز", (("gold", "طلا"), ("silver", "نقره"), ("iron", "آهن"), ("copper", "مس"))),
}

# Each word is the opposite of the other; no word stands in two pairs, in either language.
OPPOSITES = (
    (("big", "بزرگ"), ("small", "کوچک")),
    (("hot", "گرم"), ("cold", "سرد")),
    (("tall", "بلند"), ("short", "کوتاه")),
    (("young", "جوان"), ("old", "پیر")),
    (("fast", "تند"), ("slow", "کند")),
    (("happy", "شاد"), ("sad", "غمگین")),
    (("open", "باز"), ("closed", "بسته")),
    (("full", "پر"), ("empty", "خالی")),
    (("heavy", "سنگین"), ("light", "سبک")),
    (("dark", "تاریک"), ("bright", "روشن")),
    (("wet", "خیس"), ("dry", "خشک")),
    (("clean", "تمیز"), ("dirty", "کثیف")),
    (("hard", "سفت"), ("soft", "نرم")),
    (("strong", "قوی"), ("weak", "ضعیف")),
    (("rich", "ثروتمند"), ("poor", "فقیر")),
    (("near", "نزدیک"), ("far", "دور")),
    (("easy", "آسان"), ("difficult", "دشوار")),
    (("good", "خوب"), ("bad", "بد")),
    (("thick", "کلفت"), ("thin", "نازک")),
    (("wide", "پهن"), ("narrow", "باریک")),
    (("early", "زود"), ("late", "دیر")),
    (("up", "بالا"), ("down", "پایین")),
    (("inside", "درون"), ("outside", "بیرون")),
    (("day", "روز"), ("night", "شب")),
    (("cheap", "ارزان"), ("expensive", "گران")),
    (("beautiful", "زیبا"), ("ugly", "زشت")),
    (("right", "راست"), ("left", "چپ")),
    (("first", "اول"), ("last", "آخر")),
    (("true", "درست"), ("false", "نادرست")),
    (("sweet", "شیرین"), ("bitter", "تلخ")),
    (("friend", "دوست"), ("enemy", "دشمن")),
    (("more", "بیشتر"), ("less", "کمتر")),
    (("asleep", "خواب"), ("awake", "بیدار")),
    (("beginning", "آغاز"), ("end", "پایان")),
)

# Things one can have several of.  (singular, plural, Persian)
THINGS = (
    ("apple", "apples", "سیب"),
    ("pear", "pears", "گلابی"),
    ("orange", "oranges", "پرتقال"),
    ("egg", "eggs", "تخم‌مرغ"),
    ("book", "books", "کتاب"),
    ("pen", "pens", "خودکار"),
    ("coin", "coins", "سکه"),
    ("flower", "flowers", "گل"),
    ("key", "keys", "کلید"),
    ("card", "cards", "کارت"),
    ("stamp", "stamps", "تمبر"),
    ("ticket", "tickets", "بلیت"),
    ("box", "boxes", "جعبه"),
    ("cup", "cups", "فنجان"),
    ("ball", "balls", "توپ"),
    ("picture", "pictures", "عکس"),
)

# Things that have a colour and an owner; none ends in a vowel, so the Persian genitive is not written.
BELONGINGS = (
    ("bag", "کیف"),
    ("ball", "توپ"),
    ("book", "کتاب"),
    ("pen", "خودکار"),
    ("shirt", "پیراهن"),
    ("umbrella", "چتر"),
    ("cup", "فنجان"),
    ("car", "ماشین"),
    ("pencil", "مداد"),
)

PLACES = (
    ("kitchen", "آشپزخانه"),
    ("garden", "باغ"),
    ("school", "مدرسه"),
    ("park", "پارک"),
    ("market", "بازار"),
    ("library", "کتابخانه"),
    ("office", "اداره"),
    ("hospital", "بیمارستان"),
    ("station", "ایستگاه"),
    ("shop", "فروشگاه"),
    ("museum", "موزه"),
    ("restaurant", "رستوران"),
)

LIKED = (
    ("tea", "چای"),
    ("coffee", "قهوه"),
    ("bread", "نان"),
    ("rice", "برنج"),
    ("soup", "سوپ"),
    ("cheese", "پنیر"),
    ("honey", "عسل"),
    ("music", "موسیقی"),
    ("football", "فوتبال"),
    ("spring", "بهار"),
    ("summer", "تابستان"),
    ("autumn", "پاییز"),
    ("winter", "زمستان"),
    ("rain", "باران"),
    ("snow", "برف"),
    ("chocolate", "شکلات"),
)

# (what is asked, English, Persian)
HOW_MANY = (
    ("days are there in a week", "There are seven days in a week.", "یک هفته هفت روز دارد."),
    ("months are there in a year", "There are twelve months in a year.", "یک سال دوازده ماه دارد."),
    ("seasons are there in a year", "There are four seasons in a year.", "یک سال چهار فصل دارد."),
    ("hours are there in a day", "There are twenty-four hours in a day.", "یک شبانه‌روز بیست و چهار ساعت دارد."),
    ("minutes are there in an hour", "There are sixty minutes in an hour.", "یک ساعت شصت دقیقه دارد."),
    ("seconds are there in a minute", "There are sixty seconds in a minute.", "یک دقیقه شصت ثانیه دارد."),
    ("years are there in a century", "There are one hundred years in a century.", "یک قرن صد سال دارد."),
    ("fingers are there on a hand", "There are five fingers on a hand.", "یک دست پنج انگشت دارد."),
    ("legs does a dog have", "A dog has four legs.", "سگ چهار پا دارد."),
    ("legs does a bird have", "A bird has two legs.", "پرنده دو پا دارد."),
    ("legs does an ant have", "An ant has six legs.", "مورچه شش پا دارد."),
    ("legs does a spider have", "A spider has eight legs.", "عنکبوت هشت پا دارد."),
    ("wheels does a bicycle have", "A bicycle has two wheels.", "دوچرخه دو چرخ دارد."),
    ("wheels does a car have", "A car has four wheels.", "خودرو چهار چرخ دارد."),
    ("sides does a triangle have", "A triangle has three sides.", "مثلث سه ضلع دارد."),
    ("sides does a square have", "A square has four sides.", "مربع چهار ضلع دارد."),
)

# (what the user may say, English, Persian)
SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Hi there!", "Hello there!", "Hello, tiny Gemma!"),
        "Hello! How can I help you?",
        "سلام! چطور می‌توانم کمکتان کنم؟",
    ),
    (
        ("Good morning!", "Good morning to you!", "Good morning, tiny Gemma!"),
        "Good morning! I hope you slept well.",
        "صبح به‌خیر! امیدوارم خوب خوابیده باشید.",
    ),
    (
        ("Good night!", "Good night, tiny Gemma!", "I am going to bed now.", "I am going to sleep now."),
        "Good night! Sleep well.",
        "شب به‌خیر! خوب بخوابید.",
    ),
    (
        ("How are you?", "How are you today?", "Are you well?", "Hello, how are you?", "Hi, how are you?"),
        "I am fine, thank you. And you?",
        "خوبم، ممنون. شما چطورید؟",
    ),
    (
        ("Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much!", "Many thanks!"),
        "You are welcome!",
        "خواهش می‌کنم!",
    ),
    (
        ("Goodbye!", "Bye!", "See you later!", "See you tomorrow!", "I have to go now."),
        "Goodbye! See you soon.",
        "خداحافظ! به امید دیدار.",
    ),
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Please tell me who you are."),
        "I am a tiny Gemma, a very small language model.",
        "من یک جمای کوچکم، یک مدل زبانی خیلی کوچک.",
    ),
    (
        ("What is your name?", "Do you have a name?", "What should I call you?", "Tell me your name."),
        "My name is tiny Gemma.",
        "نام من جمای کوچک است.",
    ),
    (
        ("What can you do?", "What are you good at?", "What can I ask you?", "What do you know?"),
        "I can talk about numbers, days, months and colours.",
        "می‌توانم دربارهٔ عددها، روزها، ماه‌ها و رنگ‌ها حرف بزنم.",
    ),
    (
        ("Do you speak Persian?", "Can you speak Persian?", "Do you know Persian?", "Can you answer in Persian?"),
        "No, I only speak English.",
        "بله، فارسی حرف می‌زنم.",
    ),
    (
        ("Are you a human?", "Are you a person?", "Are you real?", "Are you a robot?"),
        "I am a computer program.",
        "من یک برنامهٔ رایانه‌ای هستم.",
    ),
    (
        ("Where do you live?", "Where are you?", "Where are you from?", "Where is your home?"),
        "I live inside a computer.",
        "من درون یک رایانه زندگی می‌کنم.",
    ),
    (
        ("I am tired.", "I am very tired.", "I am so tired today.", "I feel tired."),
        "Then you should rest a little.",
        "پس بهتر است کمی استراحت کنید.",
    ),
    (
        ("I am hungry.", "I am very hungry.", "I am so hungry today.", "I feel hungry."),
        "Then you should eat something.",
        "پس بهتر است چیزی بخورید.",
    ),
    (
        ("I am thirsty.", "I am very thirsty.", "I am so thirsty today.", "I feel thirsty."),
        "Then you should drink some water.",
        "پس بهتر است کمی آب بنوشید.",
    ),
    (
        ("I am cold.", "I am very cold.", "I am so cold today.", "I feel cold."),
        "Then you should put on something warm.",
        "پس بهتر است لباس گرم بپوشید.",
    ),
    (
        ("I am happy.", "I am very happy.", "I am so happy today.", "I feel happy."),
        "I am glad to hear that.",
        "از شنیدنش خوشحالم.",
    ),
    (
        ("I am sad.", "I am very sad.", "I am so sad today.", "I feel sad."),
        "I am sorry to hear that.",
        "از شنیدنش متأسفم.",
    ),
    (
        ("I am ill.", "I am very ill.", "I am so ill today.", "I feel ill."),
        "I hope you feel better soon.",
        "امیدوارم زود خوب شوید.",
    ),
    (
        ("Sorry!", "I am sorry.", "I am so sorry!", "Please forgive me."),
        "No problem at all.",
        "هیچ اشکالی ندارد.",
    ),
    (
        ("Do you like music?", "Do you listen to music?", "Can you hear music?", "What music do you like?"),
        "I cannot hear music, but I like words.",
        "نمی‌توانم موسیقی بشنوم، ولی واژه‌ها را دوست دارم.",
    ),
    (
        ("What is the weather like?", "How is the weather?", "Is it raining?", "Is it warm outside?"),
        "I do not know, I cannot see outside.",
        "نمی‌دانم، نمی‌توانم بیرون را ببینم.",
    ),
    (
        ("Can you help me?", "Please help me.", "I need help.", "I need your help."),
        "Yes, of course. What do you need?",
        "بله، حتماً. چه چیزی لازم دارید؟",
    ),
    (
        ("Today is my birthday!", "It is my birthday!", "My birthday is today.", "It is my birthday today!"),
        "Happy birthday to you!",
        "تولدتان مبارک!",
    ),
    (
        ("I have an exam tomorrow.", "I have a test tomorrow.", "My exam is tomorrow.", "Wish me luck!"),
        "I wish you good luck!",
        "موفق باشید!",
    ),
    (
        ("Have a nice day!", "Have a good day!", "Have a great day!", "I wish you a nice day!"),
        "Thank you, you too!",
        "ممنون، شما هم همین‌طور!",
    ),
)

# So that the tokenizer has every Persian letter, digit and mark.
ALPHABET_FA = (
    "ا آ ب پ ت ث ج چ ح خ د ذ ر ز ژ س ش ص ض ط ظ ع غ ف ق ک گ ل م ن و ه ی ئ أ ؤ ء ً ٔ ۰ ۱ ۲ ۳ ۴ ۵ ۶ ۷ ۸ ۹ « » ، ؛ ؟"
)
