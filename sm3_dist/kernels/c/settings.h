/* What a step does to every element. Declared once more in backend.py, as are the structs of tensors.h. */

/* Of squares that are added up, as in rms.py. */
#define LONGEST 32.0f
#define CARRIED 0x1p14
#define GRAINS 0x1p23
#define WITHOUT_AVERAGE 0x1p-8

struct settings { /* of one param group in one step; the last ones of one tensor */
    float lr;
    float decay;          /* 1 - lr * weight_decay */
    float momentum;
    float fresh;          /* 1 - momentum, negative to maximize; without momentum 1 or -1 */
    float old, new;       /* weights in nu of what the covers say and of the square of the gradient; 1 for sums */
    float eps;
    float unscale;        /* factor on the gradients */
    float limit;          /* of the length of an update before momentum, infinity for none */
    int32_t simple;       /* decay, old, new, unscale are all 1, and nothing is maximized */
    int32_t shaped;       /* what follows is of interest: it takes shaped.h */
    int32_t nesterov;
    int32_t product;      /* cover_product */
    double beta;          /* with bias correction: old and new then depend on the steps of the parameter; else 0 */
    double update_rms;    /* times fresh; 0 for none */
    double first_square;  /* of the root mean square of a first update */
    uint64_t seed;        /* of stochastic rounding */
    /* Of one tensor, filled in by pass_over(). */
    float scale;          /* of updates before momentum */
    float carrier, cap;   /* to which squares are added, a power of 2, and the largest that counts; 0: none are */
    int32_t converts;     /* whether the processor has an instruction that rounds to bfloat16 */
};
