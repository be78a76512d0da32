/* An S3 server in memory, fast enough not to be what a benchmark measures.
 *
 * Thread per connection, path-style URLs, signatures not checked. It knows: PUT, GET with
 * ranges, HEAD, DELETE, CopyObject, ListObjectsV2, DeleteObjects and multipart uploads; If-Match and
 * If-None-Match on GET, PUT and CompleteMultipartUpload; user metadata; aws-chunked bodies. A body
 * lies in pieces of at most 1 MiB that are reused; a multipart upload is completed without a copy.
 * GET /__stats tells requests, body bytes in and out, connections (of each address, too) and TLS
 * handshakes, whole and resumed ones; DELETE /__prefix/BUCKET/PREFIX forgets all keys that begin so.
 *
 * PUT /__far?NAME=NUMBER&... makes it a distant store from then on (what is not named is 0, off):
 *   first_us          microseconds from a request to the first byte of its answer
 *   tail_ppm, tail_us so many requests in a million wait so long instead
 *   rate, total       bytes per second of one connection, and of all together
 *   connect_us        added to the first answer of a connection, as handshakes would; over TLS, to
 *                     the first answer of the handshake
 *   throttle          requests a second; those beyond get 503 SlowDown
 *   dead              every so-manieth connection never answers
 *
 * usage: s3server [PORT [MIB [ADDRESSES [CERTIFICATE KEY]]]]
 *   MIB                of memory are touched before it says its port
 *   ADDRESSES          it listens on 127.0.0.1 to 127.0.0.ADDRESSES (1)
 *   CERTIFICATE, KEY   files (PEM); the port then takes TLS 1.3 as well, with tickets that any of the
 *                      addresses resumes. Only where it was compiled with -DTLS -lssl -lcrypto.
 */
#define _GNU_SOURCE
#include "http.h"
#include "s3store.h"

static unsigned long requests, bytes_in, bytes_out, connections, throttled, connections_of[ADDRESSES];
static int addresses = 1;
static struct { unsigned long first_us, tail_ppm, tail_us, rate, total, connect_us, throttle, dead; } far;
static pthread_mutex_t far_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long long total_due, throttle_due; /* nanoseconds: when all connections together may go on */

enum { CHUNK = 1 << 16 }; /* bytes sent or received at a time where they are paced */

static unsigned long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (unsigned long long)t.tv_sec * 1000000000ull + (unsigned long long)t.tv_nsec;
}

static void sleep_until(unsigned long long ns) {
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000ull), .tv_nsec = (long)(ns % 1000000000ull)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL)) {}
}

static int paced(void) { return far.rate || far.total; }

/* Wait until `bytes` have crossed the link: this connection's, and the one that all share. */
static void pace(struct stream *s, size_t bytes) {
    unsigned long long now = now_ns(), due = now;
    if (far.rate) {
        if (s->due < now) s->due = now;
        due = s->due += (unsigned long long)bytes * 1000000000ull / far.rate;
    }
    if (far.total) {
        pthread_mutex_lock(&far_lock);
        if (total_due < now) total_due = now;
        total_due += (unsigned long long)bytes * 1000000000ull / far.total;
        if (total_due > due) due = total_due;
        pthread_mutex_unlock(&far_lock);
    }
    sleep_until(due);
}

/* Of each connection its own, or those that are opened together would all be late together. */
static __thread unsigned long seed;

static void sow(unsigned long number) {
    number *= 0x9e3779b97f4a7c15ul;
    number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9ul;
    number = (number ^ (number >> 27)) * 0x94d049bb133111ebul;
    seed = (number ^ (number >> 31)) | 1;
}

/* The wait for the first byte; 0: the store says slow down. */
static int wait_first(void) {
    if (far.throttle) {
        unsigned long long now = now_ns(), gap = 1000000000ull / far.throttle;
        pthread_mutex_lock(&far_lock);
        if (throttle_due + 1000000000ull / 5 < now) throttle_due = now - 1000000000ull / 5; /* a burst of 200 ms */
        int over = throttle_due > now;
        if (!over) throttle_due += gap;
        pthread_mutex_unlock(&far_lock);
        if (over) {
            __atomic_fetch_add(&throttled, 1, __ATOMIC_RELAXED);
            return 0;
        }
    }
    unsigned long wait = far.first_us;
    if (far.tail_ppm) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        if (seed % 1000000 < far.tail_ppm) wait = far.tail_us;
    }
    if (wait) sleep_until(now_ns() + wait * 1000ull);
    return 1;
}

static int receive(struct stream *s, struct blob *b, size_t at, size_t length) {
    while (length) {
        char *to = b->size <= SMALL ? b->pieces[0] + at : b->pieces[at / PIECE] + at % PIECE;
        size_t room = b->size <= SMALL ? b->size - at : PIECE - at % PIECE;
        size_t want = length < room ? length : room;
        if (paced() && want > CHUNK) want = CHUNK;
        size_t n = want < held(s) ? want : held(s);
        if (n) {
            memcpy(to, s->data + s->at, n);
            s->at += n;
        } else {
            ssize_t got = take(s, to, want, MSG_WAITALL);
            if (got <= 0) return 0;
            n = (size_t)got;
        }
        if (paced()) pace(s, n);
        at += n;
        length -= n;
    }
    return 1;
}

/* A body of plain bytes, or in aws-chunked (inside HTTP's own chunks too, where the client does both). */
static struct blob *receive_body(struct stream *s, const struct request *r) {
    char value[64], line[1024];
    int decoded = header(r, "x-amz-decoded-content-length:", value, sizeof value);
    struct blob *b = blob_new(decoded ? strtoul(value, NULL, 10) : r->length);
    if (!decoded && !r->chunked) {
        if (receive(s, b, 0, r->length)) return b;
        blob_drop(b);
        return NULL;
    }
    for (size_t at = 0; !(decoded && r->chunked);) {
        if (!read_line(s, line, sizeof line)) break;
        size_t length = strtoul(line, NULL, 16);
        if (!length) { /* trailers, up to an empty line */
            do {
                if (!read_line(s, line, sizeof line)) goto broken;
            } while (*line);
            if (at == b->size) return b;
            break;
        }
        if (at + length > b->size || !receive(s, b, at, length) || !read_line(s, line, sizeof line)) break;
        at += length;
    }
broken:
    blob_drop(b);
    return NULL;
}

static int reply(struct stream *s, const char *status, const char *headers, const char *body) {
    char head[1024];
    int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nServer: bench\r\nContent-Type: application/xml\r\nx-amz-request-id: 1\r\nContent-Length: %zu\r\n",
                     status, strlen(body));
    struct iovec iov[] = {{head, (size_t)n}, {(char *)headers, strlen(headers)}, {"\r\n", 2}, {(char *)body, strlen(body)}};
    return say_all(s, iov, 4);
}

static int fail(struct stream *s, int status, const char *method) {
    const char *line = status == 404 ? "404 Not Found" : status == 412 ? "412 Precondition Failed" : status == 416 ? "416 Range Not Satisfiable" : status == 501 ? "501 Not Implemented" : status == 503 ? "503 Slow Down" : "400 Bad Request";
    const char *code = status == 404 ? "NoSuchKey" : status == 412 ? "PreconditionFailed" : status == 416 ? "InvalidRange" : status == 501 ? "NotImplemented" : status == 503 ? "SlowDown" : "InvalidRequest";
    char body[256];
    snprintf(body, sizeof body, "<?xml version=\"1.0\"?><Error><Code>%s</Code><Message>%s</Message></Error>", code, code);
    if (strcmp(method, "HEAD")) return reply(s, line, "", body);
    char head[256];
    int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nServer: bench\r\nContent-Length: 0\r\n\r\n", line);
    return say(s, head, (size_t)n);
}

static void unquote(const char *from, const char *end, char *to, size_t room) {
    for (; from < end && room > 1; from++, room--) {
        unsigned byte;
        if (*from == '%' && end - from > 2 && sscanf(from + 1, "%2x", &byte) == 1) *to++ = (char)byte, from += 2;
        else *to++ = *from == '+' ? ' ' : *from;
    }
    *to = 0;
}

static int parameter(const char *query, const char *name, char *out, size_t room) {
    size_t n = strlen(name);
    for (const char *p = query; p && *p; p = strchr(p, '&')) {
        if (*p == '&' || *p == '?') p++;
        size_t length = strcspn(p, "&");
        if (length >= n && !strncmp(p, name, n) && (p[n] == '=' || p[n] == '&' || !p[n])) {
            unquote(p[n] == '=' ? p + n + 1 : p + n, p + length, out, room);
            return 1;
        }
    }
    if (room) *out = 0;
    return 0;
}

static void etag_of(const struct request *r, const char *name, char *out, size_t room) {
    char value[128];
    header(r, name, value, sizeof value);
    char *v = value;
    if (*v == '"') v++;
    snprintf(out, room, "%.*s", (int)strcspn(v, "\""), v);
}

static char *metadata_of(const struct request *r) {
    char *lines = calloc(1, HEADERS), *to = lines;
    for (const char *line = strchr(r->headers, '\n'); line; line = strchr(line, '\n')) {
        line++;
        if (strncasecmp(line, "x-amz-meta-", 11)) continue;
        size_t n = strcspn(line, "\r\n");
        memcpy(to, line, n);
        memcpy(to + n, "\r\n", 2);
        to += n + 2;
    }
    return realloc(lines, (size_t)(to - lines) + 1);
}

static void checksum_line(const struct request *r, char *out, size_t room) {
    char value[64];
    *out = 0;
    if (header(r, "x-amz-checksum-crc32c:", value, sizeof value)) snprintf(out, room, "x-amz-checksum-crc32c: %s\r\n", value);
}

static int send_object(struct stream *s, const struct request *r, const char *key) {
    char range[64], match[128], head[HEADERS + 1024], date[64], where[96] = "";
    struct object *o = find(key);
    if (!o) return fail(s, 404, r->method);
    etag_of(r, "if-match:", match, sizeof match);
    size_t start = 0, end = o->size;
    int partial = header(r, "range:", range, sizeof range) && !strncmp(range, "bytes=", 6), status = 0;
    if (*match && strcmp(match, o->etag)) status = 412;
    if (partial) {
        char *dash = strchr(range, '-');
        if (range[6] == '-') start = strtoul(range + 7, NULL, 10) < o->size ? o->size - strtoul(range + 7, NULL, 10) : 0;
        else {
            start = strtoul(range + 6, NULL, 10);
            if (dash && dash[1] && strtoul(dash + 1, NULL, 10) + 1 < end) end = strtoul(dash + 1, NULL, 10) + 1;
        }
        if (start >= o->size) status = status ? status : 416;
        snprintf(where, sizeof where, "Content-Range: bytes %zu-%zu/%zu\r\n", start, end - 1, o->size);
    }
    if (status) {
        object_drop(o);
        return fail(s, status, r->method);
    }
    struct tm tm;
    gmtime_r(&o->modified, &tm);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %s\r\nServer: bench\r\nContent-Length: %zu\r\nContent-Type: %s\r\nETag: \"%s\"\r\nLast-Modified: %s\r\n"
                     "Accept-Ranges: bytes\r\nx-amz-request-id: 1\r\n%s%s\r\n",
                     partial ? "206 Partial Content" : "200 OK", end - start, o->type, o->etag, date, where, o->metadata);
    int ok = 1, first = 1;
    size_t left = strcmp(r->method, "HEAD") ? end - start : 0, blob = 0, at = start;
    while (blob + 1 < o->count && at >= o->blobs[blob]->size) at -= o->blobs[blob++]->size;
    while (ok && (first || left)) { /* the head goes out with the first pieces */
        struct iovec iov[9];
        int count = 0;
        size_t total = 0, body = 0;
        if (first) iov[count++] = (struct iovec){head, (size_t)n}, total += (size_t)n;
        while (count < 9 && left) {
            struct blob *b = o->blobs[blob];
            if (at >= b->size) { at = 0, blob++; continue; }
            size_t room = b->size <= SMALL ? b->size - at : PIECE - at % PIECE;
            if (room > b->size - at) room = b->size - at;
            if (room > left) room = left;
            if (paced() && room > CHUNK - body) room = CHUNK - body;
            if (!room) break;
            body += room;
            iov[count++] = (struct iovec){b->size <= SMALL ? b->pieces[0] + at : b->pieces[at / PIECE] + at % PIECE, room};
            total += room, at += room, left -= room;
        }
        first = 0;
        if (paced()) pace(s, total);
        ok = say_all(s, iov, count);
    }
    if (strcmp(r->method, "HEAD")) __atomic_fetch_add(&bytes_out, end - start, __ATOMIC_RELAXED);
    object_drop(o);
    return ok;
}

static int finish_put(struct stream *s, const struct request *r, const char *key, struct object *o, int multipart) {
    char match[128], none[16], extra[512], sum[128], body[512];
    char etag[64];
    snprintf(etag, sizeof etag, "%s", o->etag); /* once stored, the object may go at any time */
    etag_of(r, "if-match:", match, sizeof match);
    int status = store(key, o, match, header(r, "if-none-match:", none, sizeof none) && *none == '*');
    if (status != 200) {
        object_drop(o);
        return fail(s, status, r->method);
    }
    checksum_line(r, sum, sizeof sum);
    snprintf(extra, sizeof extra, "ETag: \"%s\"\r\n%s", etag, sum);
    snprintf(body, sizeof body, "<?xml version=\"1.0\"?><CompleteMultipartUploadResult><Location>x</Location><Bucket>bucket</Bucket><Key>key</Key><ETag>&quot;%s&quot;</ETag></CompleteMultipartUploadResult>", etag);
    return reply(s, "200 OK", extra, multipart ? body : "");
}

static int copy(struct stream *s, const struct request *r, const char *key) {
    char source[KEY], plain[KEY], body[512];
    header(r, "x-amz-copy-source:", source, sizeof source);
    char *from = *source == '/' ? source + 1 : source;
    unquote(from, from + strlen(from), plain, sizeof plain);
    struct object *old = find(plain);
    if (!old) return fail(s, 404, r->method);
    struct blob **blobs = malloc(old->count * sizeof *blobs);
    for (size_t i = 0; i < old->count; i++) __atomic_add_fetch(&(blobs[i] = old->blobs[i])->refs, 1, __ATOMIC_RELAXED);
    struct object *o = object_new(blobs, old->count, old->type, strdup(old->metadata), 0);
    object_drop(old);
    char match[128], none[16], etag[64];
    snprintf(etag, sizeof etag, "%s", o->etag);
    etag_of(r, "if-match:", match, sizeof match);
    int status = store(key, o, match, header(r, "if-none-match:", none, sizeof none) && *none == '*');
    if (status != 200) {
        object_drop(o);
        return fail(s, status, r->method);
    }
    snprintf(body, sizeof body, "<?xml version=\"1.0\"?><CopyObjectResult><ETag>&quot;%s&quot;</ETag><LastModified>2025-01-01T00:00:00.000Z</LastModified></CopyObjectResult>", etag);
    return reply(s, "200 OK", "", body);
}

static int begin_upload(struct stream *s, const struct request *r, const char *key) {
    char body[512];
    struct upload *u = calloc(1, sizeof *u);
    snprintf(u->id, sizeof u->id, "upload-%lu", __atomic_add_fetch(&serial, 1, __ATOMIC_RELAXED));
    snprintf(u->key, sizeof u->key, "%s", key);
    header(r, "content-type:", u->type, sizeof u->type);
    u->metadata = metadata_of(r);
    snprintf(body, sizeof body, "<?xml version=\"1.0\"?><InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>key</Key><UploadId>%s</UploadId></InitiateMultipartUploadResult>", u->id);
    pthread_rwlock_wrlock(&lock);
    u->next = uploads;
    uploads = u;
    pthread_rwlock_unlock(&lock);
    return reply(s, "200 OK", "", body);
}

static int put_part(struct stream *s, const struct request *r, const char *id, int number) {
    char extra[256], sum[128];
    struct blob *b = receive_body(s, r);
    if (!b) return 0;
    __atomic_fetch_add(&bytes_in, b->size, __ATOMIC_RELAXED);
    pthread_rwlock_wrlock(&lock);
    struct upload *u = number > 0 && number < PARTS ? find_upload(id) : NULL;
    struct blob *old = u ? u->parts[number] : b;
    if (u) u->parts[number] = b;
    pthread_rwlock_unlock(&lock);
    blob_drop(old);
    if (!u) return fail(s, 404, r->method);
    checksum_line(r, sum, sizeof sum);
    snprintf(extra, sizeof extra, "ETag: \"%032d\"\r\n%s", number, sum);
    return reply(s, "200 OK", extra, "");
}

static int complete(struct stream *s, const struct request *r, const char *id) {
    struct blob *body = receive_body(s, r); /* the list of parts: all that came, in order, are taken */
    if (!body) return 0;
    blob_drop(body);
    struct upload *u = take_upload(id);
    if (!u) return fail(s, 404, r->method);
    size_t count = 0;
    struct blob **blobs = malloc(PARTS * sizeof *blobs);
    for (int i = 0; i < PARTS; i++)
        if (u->parts[i]) __atomic_add_fetch(&(blobs[count++] = u->parts[i])->refs, 1, __ATOMIC_RELAXED);
    struct object *o = object_new(realloc(blobs, (count + 1) * sizeof *blobs), count, u->type, strdup(u->metadata), (int)count);
    int ok = finish_put(s, r, u->key, o, 1);
    upload_free(u);
    return ok;
}

static void xml(FILE *out, const char *text, int quoted) {
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (quoted && !((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || strchr("-_.~/", c))) fprintf(out, "%%%02X", c);
        else if (c == '<') fputs("&lt;", out);
        else if (c == '>') fputs("&gt;", out);
        else if (c == '&') fputs("&amp;", out);
        else fputc(c, out);
    }
}

static int list(struct stream *s, const char *bucket, const char *query) {
    char prefix[KEY], delimiter[16], after[KEY], token[KEY], text[32], full[KEY + 256], last[KEY] = "", folder[KEY] = "";
    size_t root = strlen(bucket) + 1, limit = 1000, count = 0, length;
    parameter(query, "prefix", prefix, sizeof prefix);
    parameter(query, "delimiter", delimiter, sizeof delimiter);
    parameter(query, "start-after", after, sizeof after);
    if (parameter(query, "continuation-token", token, sizeof token)) snprintf(after, sizeof after, "%s", token);
    if (parameter(query, "max-keys", text, sizeof text)) limit = strtoul(text, NULL, 10);
    if (limit > 1000) limit = 1000;
    int quoted = parameter(query, "encoding-type", text, sizeof text), more = 0, found;
    char *buffer;
    FILE *out = open_memstream(&buffer, &length);
    fprintf(out, "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>%s</Name><MaxKeys>%zu</MaxKeys>", bucket, limit);
    if (quoted) fputs("<EncodingType>url</EncodingType>", out);
    fputs("<Prefix>", out), xml(out, prefix, quoted), fputs("</Prefix>", out);
    pthread_rwlock_rdlock(&lock);
    snprintf(full, sizeof full, "%s/%s", bucket, strcmp(after, prefix) > 0 ? after : prefix);
    for (size_t i = position(full, &found); i < entry_count; i++) {
        const char *key = entries[i].key + root;
        if (strncmp(entries[i].key, bucket, root - 1) || entries[i].key[root - 1] != '/' || strncmp(key, prefix, strlen(prefix))) break;
        if (*after && strcmp(key, after) <= 0) continue;
        if (*after && *delimiter && !strncmp(key, after, strlen(after)) && strstr(after + strlen(prefix) * (strlen(after) >= strlen(prefix)), delimiter)) continue;
        const char *cut = *delimiter ? strstr(key + strlen(prefix), delimiter) : NULL;
        if (cut && *folder && !strncmp(key, folder, strlen(folder))) continue;
        if (count == limit) { more = 1; break; }
        count++;
        if (cut) {
            snprintf(folder, sizeof folder, "%.*s", (int)(cut - key + (long)strlen(delimiter)), key);
            fputs("<CommonPrefixes><Prefix>", out), xml(out, folder, quoted), fputs("</Prefix></CommonPrefixes>", out);
            snprintf(last, sizeof last, "%s", folder);
            continue;
        }
        snprintf(last, sizeof last, "%s", key);
        fputs("<Contents><Key>", out), xml(out, key, quoted);
        fprintf(out, "</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified><ETag>&quot;%s&quot;</ETag><Size>%zu</Size><StorageClass>STANDARD</StorageClass></Contents>",
                entries[i].object->etag, entries[i].object->size);
    }
    pthread_rwlock_unlock(&lock);
    fprintf(out, "<KeyCount>%zu</KeyCount><IsTruncated>%s</IsTruncated>", count, more ? "true" : "false");
    if (more) fputs("<NextContinuationToken>", out), xml(out, last, 0), fputs("</NextContinuationToken>", out);
    fputs("</ListBucketResult>", out);
    fclose(out);
    int ok = reply(s, "200 OK", "", buffer);
    free(buffer);
    return ok;
}

static int delete_many(struct stream *s, const struct request *r, const char *bucket) {
    struct blob *b = receive_body(s, r);
    if (!b) return 0;
    char *text = malloc(b->size + 1), *key, full[KEY + 256];
    for (size_t i = 0, at = 0; i < b->count; i++) {
        size_t n = b->size - at < PIECE ? b->size - at : PIECE;
        memcpy(text + at, b->pieces[i], n);
        at += n;
    }
    text[b->size] = 0;
    for (key = text; (key = strstr(key, "<Key>"));) {
        key += 5;
        char *end = strstr(key, "</Key>");
        if (!end) break;
        *end = 0;
        char *to = key;
        for (char *from = key; *from; to++) { /* the five entities of XML */
            static const char *names[] = {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;", NULL};
            int k = 0;
            while (names[k] && strncmp(from, names[k], strlen(names[k]))) k++;
            *to = names[k] ? "&<>\"'"[k] : *from;
            from += names[k] ? strlen(names[k]) : 1;
        }
        *to = 0;
        snprintf(full, sizeof full, "%s/%s", bucket, key);
        store(full, NULL, "", 0);
        key = end + 1;
    }
    free(text);
    blob_drop(b);
    return reply(s, "200 OK", "", "<?xml version=\"1.0\"?><DeleteResult></DeleteResult>");
}

static int stats(struct stream *s) {
    char body[512 + 48 * ADDRESSES];
    int n = snprintf(body, sizeof body,
                     "{\"requests\": %lu, \"bytes_in\": %lu, \"bytes_out\": %lu, \"objects\": %zu, \"connections\": %lu, \"throttled\": %lu, "
                     "\"tls_full\": %lu, \"tls_resumed\": %lu",
                     requests, bytes_in, bytes_out, entry_count, connections, throttled, (unsigned long)tls_full, (unsigned long)tls_resumed);
    for (int i = 0; i < addresses; i++) n += snprintf(body + n, sizeof body - (size_t)n, ", \"connections_127.0.0.%d\": %lu", i + 1, connections_of[i]);
    snprintf(body + n, sizeof body - (size_t)n, "}\n");
    return reply(s, "200 OK", "", body);
}

static int forget(struct stream *s, const char *prefix) {
    int found;
    pthread_rwlock_wrlock(&lock);
    size_t first = position(prefix, &found), end = first;
    for (; end < entry_count && !strncmp(entries[end].key, prefix, strlen(prefix)); end++) {
        object_drop(entries[end].object);
        free(entries[end].key);
    }
    memmove(entries + first, entries + end, (entry_count - end) * sizeof *entries);
    entry_count -= end - first;
    pthread_rwlock_unlock(&lock);
    return reply(s, "200 OK", "", "");
}

static int set_far(const char *query) {
    static const char *names[] = {"first_us", "tail_ppm", "tail_us", "rate", "total", "connect_us", "throttle", "dead"};
    unsigned long *fields = (unsigned long *)&far;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char value[32];
        fields[i] = parameter(query, names[i], value, sizeof value) ? strtoul(value, NULL, 10) : 0;
    }
    return 1;
}

static int answer(struct stream *s, const struct request *r) {
    char path[KEY], id[64], number[16], bucket[256], source[8];
    const char *query = strchr(r->target, '?'), *end = query ? query : r->target + strlen(r->target);
    const char *m = r->method;
    char raw[TARGET];
    snprintf(raw, sizeof raw, "%.*s", (int)(end - r->target), r->target);
    for (char *p = raw; *p; p++) if (*p == '+') *p = 1; /* a plus in a path is a plus */
    unquote(raw + 1, raw + strlen(raw), path, sizeof path);
    for (char *p = path; *p; p++) if (*p == 1) *p = '+';
    query = query ? query : "";
    snprintf(bucket, sizeof bucket, "%.*s", (int)strcspn(path, "/"), path);
    const char *key = path[strlen(bucket)] ? path + strlen(bucket) + 1 : "";
    if (!strcmp(r->target, "/__stats")) return stats(s);
    if (!strncmp(r->target, "/__far", 6)) return set_far(query) && drop(s, r->length) && reply(s, "200 OK", "", "");
    if (!strncmp(r->target, "/__prefix/", 10)) return forget(s, r->target + 10);
    __atomic_fetch_add(&requests, 1, __ATOMIC_RELAXED);
    if (!wait_first()) return drop(s, r->length) && fail(s, 503, r->method);
    int has_id = parameter(query, "uploadId", id, sizeof id);
    if (!*key) {
        if (!strcmp(m, "GET") && strstr(query, "uploads") && !strstr(query, "prefix=uploads"))
            return reply(s, "200 OK", "", "<?xml version=\"1.0\"?><ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>");
        if (!strcmp(m, "GET")) return list(s, bucket, query);
        if (!strcmp(m, "POST")) return delete_many(s, r, bucket);
        return drop(s, r->length) && reply(s, "200 OK", "", "");
    }
    if (!strcmp(m, "GET") || !strcmp(m, "HEAD")) return send_object(s, r, path);
    if (!strcmp(m, "PUT") && has_id && parameter(query, "partNumber", number, sizeof number)) return put_part(s, r, id, atoi(number));
    if (!strcmp(m, "PUT") && header(r, "x-amz-copy-source:", source, sizeof source)) return copy(s, r, path);
    if (!strcmp(m, "PUT")) {
        char type[128];
        struct blob *b = receive_body(s, r), **blobs;
        if (!b) return 0;
        __atomic_fetch_add(&bytes_in, b->size, __ATOMIC_RELAXED);
        blobs = malloc(sizeof *blobs);
        *blobs = b;
        header(r, "content-type:", type, sizeof type);
        return finish_put(s, r, path, object_new(blobs, 1, type, metadata_of(r), 0), 0);
    }
    if (!strcmp(m, "POST") && has_id) return complete(s, r, id);
    if (!strcmp(m, "POST")) return drop(s, r->length) && begin_upload(s, r, path);
    if (!strcmp(m, "DELETE")) {
        struct upload *u = has_id ? take_upload(id) : NULL;
        if (u) upload_free(u);
        if (!has_id) store(path, NULL, "", 0);
        const char *gone = "HTTP/1.1 204 No Content\r\nServer: bench\r\n\r\n";
        return say(s, gone, strlen(gone));
    }
    return fail(s, 501, m);
}

static void *serve(void *argument) {
    struct stream *s = argument;
    struct request *r = malloc(sizeof *r);
    unsigned long number = __atomic_add_fetch(&connections, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&connections_of[s->address], 1, __ATOMIC_RELAXED);
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    sow(number);
    if (far.connect_us) sleep_until(now_ns() + far.connect_us * 1000ull);
    if (far.dead && number % far.dead == 0)
        while (fill(s)) s->at = s->end = 0;
    if (greet(s))
        while (read_head(s, r) && answer(s, r)) {}
    free(r);
    hang_up(s);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc > 2) reserve(strtoul(argv[2], NULL, 10));
    if (argc > 3) addresses = atoi(argv[3]);
    if (argc > 4 && !(argc > 5 && use_tls(argv[4], argv[5]))) return 2;
    return listen_forever(argc > 1 ? atoi(argv[1]) : 0, addresses, serve);
}
