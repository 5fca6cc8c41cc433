/* Forgets one width before the next. */

#undef OF
#undef WIDE_INLINE
#undef ALL
#undef TAKES_TURNS
#undef SIDE_BY_SIDE
