/* A server that swallows uploads: as little work as a server can do and still be taken for S3.
 *
 * Thread per connection. Reads the head of a request, drops its body and answers 200 with an ETag,
 * or with the XML that CreateMultipartUpload, CompleteMultipartUpload, DeleteObjects and
 * ListObjects expect. A checksum sent as a header comes back as a header, as S3 does it.
 * HEAD finds every key, with the ETag that every write is told.
 * GET /__stats answers with the number of requests and body bytes seen so far.
 *
 * usage: sink [PORT]
 */
#define _GNU_SOURCE
#include "http.h"

static unsigned long requests, body_bytes;

static int drop_chunked(struct stream *s, size_t *total) {
    char line[256];
    for (*total = 0;;) {
        if (!read_line(s, line, sizeof line)) return 0;
        size_t length = strtoul(line, NULL, 16);
        if (!drop(s, length + 2)) return 0; /* after the last chunk: the line end of no trailers */
        *total += length;
        if (!length) return 1;
    }
}

static int answer(struct stream *s, const struct request *r) {
    char body[1024] = "", extra[256] = "", text[2048], checksum[128];
    const char *status = "200 OK", *query = strchr(r->target, '?');
    if (!query) query = "";
    if (!strcmp(r->method, "POST") && strstr(query, "uploads"))
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>key</Key>"
                                    "<UploadId>upload-1</UploadId></InitiateMultipartUploadResult>");
    else if (!strcmp(r->method, "POST") && strstr(query, "uploadId"))
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><CompleteMultipartUploadResult><Location>x</Location><Bucket>bucket</Bucket>"
                                    "<Key>key</Key><ETag>&quot;d41d8cd98f00b204e9800998ecf8427e-1&quot;</ETag></CompleteMultipartUploadResult>");
    else if (!strcmp(r->method, "POST"))
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><DeleteResult></DeleteResult>");
    else if (!strcmp(r->method, "GET") && !strcmp(r->target, "/__stats"))
        snprintf(body, sizeof body, "{\"requests\": %lu, \"bytes\": %lu}\n", requests, body_bytes);
    else if (!strcmp(r->method, "GET") && *query)
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount>"
                                    "<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>");
    else if (!strcmp(r->method, "GET"))
        status = "404 Not Found";
    else if (!strcmp(r->method, "DELETE"))
        status = "204 No Content";
    if (header(r, "x-amz-checksum-crc32c:", checksum, sizeof checksum))
        snprintf(extra, sizeof extra, "x-amz-checksum-crc32c: %s\r\n", checksum);
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 %s\r\nServer: sink\r\nContent-Length: %zu\r\nContent-Type: application/xml\r\n"
                     "ETag: \"d41d8cd98f00b204e9800998ecf8427e-1\"\r\nLast-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n"
                     "x-amz-request-id: 1\r\n%s\r\n%s",
                     status, strlen(body), extra, body);
    return say(s, text, (size_t)n);
}

static void *serve(void *argument) {
    struct stream *s = argument;
    struct request r;
    while (read_head(s, &r)) {
        if (r.chunked ? !drop_chunked(s, &r.length) : !drop(s, r.length)) break;
        if (strcmp(r.target, "/__stats")) {
            __atomic_fetch_add(&requests, 1, __ATOMIC_RELAXED);
            __atomic_fetch_add(&body_bytes, r.length, __ATOMIC_RELAXED);
        }
        if (!answer(s, &r)) break;
    }
    hang_up(s);
    return NULL;
}

int main(int argc, char **argv) { return listen_forever(argc > 1 ? atoi(argv[1]) : 0, 1, serve); }
